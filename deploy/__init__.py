"""Roof: decides what runs where. The only room that sees all others, and the only one with ray."""
