"""Mounting: options, checks of the host, and the life of the daemon."""
