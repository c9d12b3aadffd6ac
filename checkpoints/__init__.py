"""Durable, layout-free checkpoint store, and the way between it and a DeepSpeed engine."""
