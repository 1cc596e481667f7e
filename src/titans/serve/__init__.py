"""`titans serve`: models over HTTP in OpenAI's form, with memories that clients name."""
