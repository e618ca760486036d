"""What leaves the project: model cards, Modelfiles, the Hub."""
