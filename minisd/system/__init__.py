"""What minisd asks of the machine: a device, memory, files that are written whole or not at all, a cache, finite numbers."""
