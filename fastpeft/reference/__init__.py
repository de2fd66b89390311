"""What each op computes, in plain differentiable PyTorch: the specification of the ops and the oracle of the tests."""
