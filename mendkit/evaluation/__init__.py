"""What an edit did: teacher-forced and free scores, rows and means with intervals."""
