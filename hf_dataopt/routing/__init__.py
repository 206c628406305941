"""The attention dispatcher: what one call of a model carries, and who answers its attention. Knows no method."""
