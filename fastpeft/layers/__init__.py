"""nn.Modules over the ops: what is put into a model."""
