"""The door to trainers: gRPC on a Unix socket, in the vocabulary of protos/moshpitd/local/v1."""
