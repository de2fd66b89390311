"""The operations: check the arguments, choose an implementation, and wrap it for autograd."""
