"""The load generator behind `penstock bench`."""
