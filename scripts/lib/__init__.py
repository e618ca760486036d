"""What two scripts or more share. It knows nothing of any one script."""
