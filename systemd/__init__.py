"""Units of systemd, and scripts of Termux: data for `agentd service`."""
