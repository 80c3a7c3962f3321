"""Environment adapters: everything that turns someone's simulator into `system.interfaces.VectorEnv`."""
