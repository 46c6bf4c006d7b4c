"""Low-rank adapters of the model that a worker serves: their files, the room they are kept in, their arithmetic."""
