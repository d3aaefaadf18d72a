"""What pruning a model will need, before it is loaded: memory part by part, disk, time, and what helps."""
