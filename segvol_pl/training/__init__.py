"""Pre-training and supervised training: the tasks, their losses, the strategies, and what keeps a run alive."""
