"""What a run costs before it is started: FLOPs, memory, rates by device. Starts without torch."""
