//! What a user is told when something is refused or fails.

use std::fmt::Display;

/// One line that says what happened, and what to do about it where that is known.
#[derive(Debug)]
pub(crate) struct CliError {
    message: String,
    hint: Option<String>,
    kind: Kind,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Refused or failed.
    Failed,
    /// As above, since a GPU cannot be used as the plan needs it.
    NoGpu,
    /// Flags that contradict each other.
    Usage,
}

/// Result of a command.
pub(crate) type CliResult<T = ()> = Result<T, CliError>;

impl CliError {
    /// Refused or failed: exit code 1.
    pub(crate) fn new(message: impl Display) -> Self {
        Self { message: one_line(&message.to_string()), hint: None, kind: Kind::Failed }
    }

    /// A GPU cannot be used as the plan needs it: exit code 1, but with `--backend auto` the host takes over.
    pub(crate) fn no_gpu(message: impl Display) -> Self {
        Self { kind: Kind::NoGpu, ..Self::new(message) }
    }

    /// Flags that contradict each other: exit code 2.
    pub(crate) fn usage(message: impl Display) -> Self {
        Self { kind: Kind::Usage, ..Self::new(message) }
    }

    /// Adds what to do.
    pub(crate) fn hint(mut self, hint: impl Display) -> Self {
        self.hint = Some(one_line(&hint.to_string()));
        self
    }

    /// An error of a library, with what to do where it says so.
    pub(crate) fn with_hint(message: impl Display, hint: Option<impl Display>) -> Self {
        let error = Self::new(message);
        match hint {
            Some(hint) => error.hint(hint),
            None => error,
        }
    }

    /// What happened, without the hint.
    pub(crate) fn message(&self) -> &str {
        &self.message
    }

    /// Whether it is of [`no_gpu`](Self::no_gpu).
    pub(crate) fn is_no_gpu(&self) -> bool {
        self.kind == Kind::NoGpu
    }

    /// The process's exit code.
    pub(crate) fn exit_code(&self) -> u8 {
        if self.kind == Kind::Usage { 2 } else { 1 }
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
