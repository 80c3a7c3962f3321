"""The second floor, left: experience in the making. The only room with gymnasium and envpool."""
