"""Fine-tuning a checkpoint on your own cases, from files to a report, in one command."""
