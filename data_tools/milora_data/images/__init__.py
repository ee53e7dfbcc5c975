"""Load pictures as RGB and convert them to the pixel values of a model."""
