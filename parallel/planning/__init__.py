"""What a layout costs before it runs: memory and time of each process, and the layouts that are best."""
