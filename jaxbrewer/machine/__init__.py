"""Where arrays lie: devices, placement, processes, memory, compiled programs."""
