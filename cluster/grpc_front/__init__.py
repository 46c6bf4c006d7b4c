"""The gRPC front: the published `penstock.proto`, its messages, and the servicer behind both ways to it."""
