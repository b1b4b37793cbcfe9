"""A recurrent progressive image codec."""
