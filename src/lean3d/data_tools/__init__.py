"""A data set before the training: is it whole (`check`), and in the form that loads fastest (`prepare`)."""
