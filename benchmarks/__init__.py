"""Studies of what the system's parts are worth, run by hand; no package imports them."""
