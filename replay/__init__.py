"""Experience at rest: shards of live Zarr segments, the limiter, and the sampler that feeds the learner."""
