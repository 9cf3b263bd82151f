"""What a run survives: kills, damage, changed jobs, bad batches, hostile files."""
