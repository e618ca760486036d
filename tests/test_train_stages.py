"""train_stage2.py and train_stage3.py on a tiny model: rows of stages 2 and 3, what each changes and what it leaves."""
