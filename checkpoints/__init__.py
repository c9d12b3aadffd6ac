"""Durable, layout-free checkpoint store and format conversions."""
