"""Other projects' replay buffers under the same load: each a program in an environment of its own."""
