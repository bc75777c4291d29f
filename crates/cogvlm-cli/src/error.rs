//! What a user is told when something is refused or fails.

use std::fmt::Display;

/// One line that says what happened, and what to do about it where that is known.
#[derive(Debug)]
pub(crate) struct CliError {
    message: String,
    hint: Option<String>,
    usage: bool,
}

/// Result of a command.
pub(crate) type CliResult<T = ()> = Result<T, CliError>;

impl CliError {
    /// Refused or failed: exit code 1.
    pub(crate) fn new(message: impl Display) -> Self {
        Self { message: one_line(&message.to_string()), hint: None, usage: false }
    }

    /// Flags that contradict each other: exit code 2.
    pub(crate) fn usage(message: impl Display) -> Self {
        Self { usage: true, ..Self::new(message) }
    }

    /// Adds what to do.
    pub(crate) fn hint(mut self, hint: impl Display) -> Self {
        self.hint = Some(one_line(&hint.to_string()));
        self
    }

    /// What happened, without the hint.
    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// The process's exit code.
    pub(crate) fn exit_code(&self) -> u8 {
        if self.usage { 2 } else { 1 }
    }

    /// `error:` and `hint:` lines.
    pub(crate) fn render(&self) -> String {
        match &self.hint {
            Some(hint) => format!("error: {}\nhint: {hint}\n", self.message),
            None => format!("error: {}\n", self.message),
        }
    }
}

/// Errors stay on one line, whatever a file's name or content is.
fn one_line(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

/// Turns any library error into one for the user.
impl<E: std::error::Error> From<E> for CliError {
    fn from(error: E) -> Self {
        Self::new(error)
    }
}
