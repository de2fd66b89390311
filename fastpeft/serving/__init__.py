"""Many adapters on one base model, over HTTP: requests for different adapters are computed in one batch.

batcher: what waits and what goes together; engine: a batch through the model; app: HTTP; metrics: what is counted.
"""
