"""What a pipeline will take: timings of this machine, the work to do, the cost of each stage."""
