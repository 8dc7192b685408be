"""Training: state, one jitted step, averages of the weights, optimizers, and the loop."""
