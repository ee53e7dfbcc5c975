"""Picture files to RGB and to the pixel values a model reads."""
