"""The ground floor: command line, artifacts, hardware, runs. It imports no other room and knows no stage."""
