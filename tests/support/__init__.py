"""Small models, data and processes that the tests share."""
