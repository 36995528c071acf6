"""The name under which kernels mark what their backward pass needs of the forward pass."""

SAVED = "attention"
"""`checkpoint_name` of the output and of the log-sum-exp. Rematerialization that saves them need not compute attention
again."""
