"""Pictures of observations and of what is imagined."""
