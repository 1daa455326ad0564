"""What people and other programs get of folders: tables on the terminal, exports, pages, JSON Schemas."""
