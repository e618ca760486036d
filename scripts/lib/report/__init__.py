"""Pages for people: figures, tables, where a result came from."""
