"""Images to work on: categories in local folders, and made-up samples."""
