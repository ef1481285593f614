"""Devices: how a machine is reached (local, SSH, ADB, browser), and the runner that runs there."""
