"""Pictures of observations and imagination."""
