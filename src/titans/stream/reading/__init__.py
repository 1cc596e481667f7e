"""Reading files of any length into a session: text, PDF, folders; in pieces, with progress, resumable."""
