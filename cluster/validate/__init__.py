"""Offline checks of configuration files, Serve configurations and Kubernetes manifests, for `penstock validate`."""
