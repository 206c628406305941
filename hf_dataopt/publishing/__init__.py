"""What is written to disk and to the Hub, and how it is read back: one writer, one reader, cards; knows no method."""
