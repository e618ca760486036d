"""What a step needs in memory, estimated before anything is loaded."""
