"""CT volumes in memory and on disk: reading, geometry, intensities, transforms, prompts, and writing masks."""
