"""The sections of the page: each module returns the values of its template in templates/."""
